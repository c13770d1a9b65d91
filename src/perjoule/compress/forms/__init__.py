"""The forms. To add one: a file here, a line here, a test file that subclasses FormConformance."""

from perjoule.compress.forms.base import Form as Form
from perjoule.compress.forms.base import Metric as Metric
from perjoule.compress.forms.base import Packed as Packed
from perjoule.compress.forms.channels import Channels as Channels
from perjoule.compress.forms.codebook import Codebook as Codebook
from perjoule.compress.forms.compose import Composed as Composed
from perjoule.compress.forms.compose import Sum as Sum
from perjoule.compress.forms.floats import Float as Float
from perjoule.compress.forms.grid import Grid as Grid
from perjoule.compress.forms.lowrank import LowRank as LowRank
from perjoule.compress.forms.nm import NM as NM
from perjoule.compress.forms.sparse import Sparse as Sparse

FORMS: dict[str, type[Form]] = {
    form.__name__: form for form in (Grid, Float, Sparse, NM, LowRank, Channels, Codebook, Composed, Sum)
}
