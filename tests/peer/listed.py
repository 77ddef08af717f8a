"""Tests of mergekit's suite that do not run as all others: parts of their ids, and why.

WITHOUT  run without the engine: they look into a part of mergekit that the engine takes the place of, or at a value
         that is another one here, as the method's documentation says (`fastinterp methods NAME`)
STAYS    run with it, and merge something that mergekit then computes itself: docs/MERGEKIT.md, "What stays with
         mergekit". The engine logs the reason
FLOAT64  run with it, and merge float64 among other dtypes, which mergekit computes: arithmetic here is float32
"""

from __future__ import annotations

_BATCHES = "it counts how mergekit packs tensors into batches for its own kernels"
_ROWS = "it wants a vocab_size of more rows than there are, which transformers does not load: here it is theirs"
_BOTH = "both refuse: mergekit's exception is what its callers expect"

WITHOUT = {
    "test_linear_buckets_options_shapes_and_restores_order": _BATCHES,
    "test_packing_budget_and_oversized_singletons": _BATCHES,
    "test_slerp_mixed_geometries_varying_coefficients_and_base_order": _BATCHES,
    "test_different_dtypes_and_input_counts_partition_batches": _BATCHES,
    "test_truncation_preserves_donor_config": _ROWS,
    "test_truncation_copies_out_of_range_metadata": _ROWS,
    "test_karcher_below_tolerance_keeps_zero_gradients": "short tensors count here (`fastinterp methods karcher`)",
}
STAYS = {
    "test_della_invalid_epsilon": _BOTH,
    "test_mismatched_vocabulary_requires_alignment": _BOTH,
    "test_default_and_allow_crimes_do_not_truncate": _BOTH,
    "test_linear_zero_weight_sum_follows_tensor_division": "weights that cancel are an error here, not Inf and NaN",
}
FLOAT64 = (
    "test_direct_and_state_dict_calls_share_dtype_policy",
    "test_float_coefficients_follow_input_precision",
    "test_incremental_dtype_conversion_preserves_autograd",
    "test_karcher_differentiates_output_scale",
    "test_linear_weighted_sum_and_normalization",
    "test_merge_tensors_aligns_parameters_and_preserves_gradients",
    "test_model_stock_singularity_retains_base_with_finite_gradients",
    "test_nuslerp_mixed_collinear_rows_have_finite_gradients",
    "test_raw_graph_dtype_policy",
    "test_spherical_merge_gradients_match_finite_differences",
    "test_state_dict_promotes_each_weight_independently",
    "test_task_arithmetic_values_and_gradients",
)
