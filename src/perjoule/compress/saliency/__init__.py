"""The saliencies. To add one: a file here, a line here, a test file that subclasses SaliencyConformance."""

from perjoule.compress.saliency.activation import Activation as Activation
from perjoule.compress.saliency.base import Saliency as Saliency
from perjoule.compress.saliency.base import Statistics as Statistics
from perjoule.compress.saliency.gradient import Gradient as Gradient
from perjoule.compress.saliency.identity import Identity as Identity
from perjoule.compress.saliency.random import Random as Random
from perjoule.compress.saliency.second_order import SecondOrder as SecondOrder
from perjoule.compress.saliency.taylor import Taylor as Taylor

SALIENCIES: dict[str, Saliency] = {
    "identity": Identity(),
    "activation": Activation(),
    "second_order": SecondOrder(),
    "gradient": Gradient(),
    "taylor": Taylor(),
    "random": Random(),
}
