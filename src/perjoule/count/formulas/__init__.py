"""The formulas, one file per family; importing this package registers them all."""

from __future__ import annotations

from perjoule.count.formulas import attention as attention
from perjoule.count.formulas import backward as backward
from perjoule.count.formulas import dropout as dropout
from perjoule.count.formulas import elementwise as elementwise
from perjoule.count.formulas import matmul as matmul
from perjoule.count.formulas import movement as movement
from perjoule.count.formulas import quantized as quantized
from perjoule.count.formulas import recurrent as recurrent
from perjoule.count.formulas import recurrent_back as recurrent_back
from perjoule.count.formulas import reductions as reductions
from perjoule.count.formulas import shapes as shapes
from perjoule.count.formulas import shapes_back as shapes_back
from perjoule.count.formulas import sparse as sparse
