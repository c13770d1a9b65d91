"""Equivalent transformations: the float network computes the same, its quantised weights or activations err less."""

from perjoule.compress.transform.exponents import Migration as Migration
from perjoule.compress.transform.exponents import awq as awq
from perjoule.compress.transform.exponents import smoothquant as smoothquant
from perjoule.compress.transform.scaling import Scaling as Scaling
from perjoule.compress.transform.scaling import scalings as scalings
