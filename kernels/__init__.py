"""Fused ops of the inversion losses; each file holds definition, reference, kernels and public function."""

from kernels.bn_moments import bn_moment_loss, bn_moment_loss_ref, bn_moments, bn_moments_ref
from kernels.js_divergence import js_divergence, js_divergence_ref
from kernels.total_variation import total_variation, total_variation_ref

__all__ = [
    "bn_moment_loss",
    "bn_moment_loss_ref",
    "bn_moments",
    "bn_moments_ref",
    "js_divergence",
    "js_divergence_ref",
    "total_variation",
    "total_variation_ref",
]
