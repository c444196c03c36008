"""Regions on auxiliary streams: the part of auxstream that eager code runs through."""

from .errors import AuxstreamError, AuxstreamWarning
from .regions import Region, aux_region, fork, parallel

__all__ = ["AuxstreamError", "AuxstreamWarning", "Region", "aux_region", "fork", "parallel"]
