"""How many tokens a model can see, as its configuration says."""

from __future__ import annotations

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from qratk.training.building import context_length


def test_of_a_composite_configuration_the_text_part_counts() -> None:
    text = LlamaConfig(max_position_embeddings=321)
    assert context_length(text) == 321
    assert context_length(LlavaConfig(text_config=text, vision_config=CLIPVisionConfig())) == 321
