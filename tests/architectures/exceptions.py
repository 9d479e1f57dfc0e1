"""What does not hold, of which architecture, and why; a test fails where an entry is no longer needed."""

REACH = "test_every_softmax_over_tokens_is_ours"
EQUAL = "test_without_noise_it_equals_eager"
HARD = "test_a_hard_choice_changes_the_output"
NOISE = "test_training_is_noisy_and_eval_is_not"
REMOVAL = "test_removal_leaves_nothing"
SECOND = "test_a_second_model_of_the_same_config_object_is_untouched"
GRADIENT = "test_gradient_reaches_every_projection"
FUTURE = "test_a_future_token_never_changes_an_earlier_position"
PADDING = "test_a_padded_token_never_changes_a_real_position"

LEFT_BLOCKS = "transformers' own: the unpatched model counts left padding into its blocks of tokens"
CONVOLUTION = "transformers' own: the unpatched model convolves or pools over the padding"

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("ibert", REACH): "refused: its softmax is integer arithmetic",
    ("reformer", REACH): "refused: it attends within hash buckets, without a softmax call",
    ("blt", EQUAL): "transformers' own: with left padding its unpatched sdpa differs from its eager just as much",
    ("blt", PADDING): LEFT_BLOCKS,
    ("deepseek_v4", PADDING): LEFT_BLOCKS,
    ("dpr", PADDING): "it pools the first position, which left padding fills",
    **{
        (name, PADDING): CONVOLUTION
        for name in ("canine", "convbert", "funnel", "mobilebert", "nystromformer", "sam3_lite_text_text_model")
    },
    ("recurrent_gemma", PADDING): "transformers' own: its convolution and recurrence read left padding",
    ("cpmant", PADDING): "transformers' own: it derives its mask from the token ids and ignores the one it is given",
    ("cpmant", FUTURE): "transformers' own: the unpatched model's prompt sees the whole input",
    ("xlnet", FUTURE): "it sees the whole input unless a permutation mask is given",
}

OTHERS: dict[str, str] = {
    "evolla": "without a protein its adapters return before they attend, which the check of the first call refuses",
}
"""The same for what reads more than text."""
