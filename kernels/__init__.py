"""Fused ops, each with its definition `<op>_ref`; fused BatchNorms; a step as a CUDA graph."""

from kernels._layer_moments import LayerMoments
from kernels.attention_transfer import (
    attention_map,
    attention_map_ref,
    attention_transfer,
    attention_transfer_ref,
)
from kernels.bn_act_moments import bn_act_moments, bn_act_moments_ref
from kernels.bn_moments import bn_moment_loss, bn_moment_loss_ref, bn_moments, bn_moments_ref
from kernels.cuda_graph import CapturedStep
from kernels.fake_quantize import (
    fake_quantize,
    fake_quantize_channels,
    fake_quantize_channels_ref,
    fake_quantize_ref,
    quantization_grid,
)
from kernels.fuse_batchnorm import fuse_batchnorm, hook_batchnorm
from kernels.jittered_view import jittered_view, jittered_view_ref
from kernels.js_divergence import js_divergence, js_divergence_ref, js_released
from kernels.kl_divergence import kl_divergence, kl_divergence_ref
from kernels.moment_distance import moment_distance, moment_distance_ref
from kernels.pointwise_bn_act_moments import (
    pointwise_bn_act_moments,
    pointwise_bn_act_moments_ref,
)
from kernels.total_variation import total_variation, total_variation_ref

__all__ = [
    "CapturedStep",
    "LayerMoments",
    "attention_map",
    "attention_map_ref",
    "attention_transfer",
    "attention_transfer_ref",
    "bn_act_moments",
    "bn_act_moments_ref",
    "bn_moment_loss",
    "bn_moment_loss_ref",
    "bn_moments",
    "bn_moments_ref",
    "fake_quantize",
    "fake_quantize_channels",
    "fake_quantize_channels_ref",
    "fake_quantize_ref",
    "fuse_batchnorm",
    "hook_batchnorm",
    "jittered_view",
    "jittered_view_ref",
    "js_divergence",
    "js_divergence_ref",
    "js_released",
    "kl_divergence",
    "kl_divergence_ref",
    "moment_distance",
    "moment_distance_ref",
    "pointwise_bn_act_moments",
    "pointwise_bn_act_moments_ref",
    "quantization_grid",
    "total_variation",
    "total_variation_ref",
]
