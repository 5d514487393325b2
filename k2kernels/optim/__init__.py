"""Muon and MuonClip: Muon with QK-Clip for attention, and AdamW for what is not a hidden matrix."""

from k2kernels.optim.muon import Muon
from k2kernels.optim.muonclip import MuonClip
from k2kernels.optim.qk_clip import ClipReport, ClipTarget, QKClip

__all__ = ["ClipReport", "ClipTarget", "Muon", "MuonClip", "QKClip"]
