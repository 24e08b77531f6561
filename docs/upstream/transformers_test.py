"""For tests/models/phi3/test_modeling_phi3.py of transformers: the config of the first 128k checkpoints."""

from transformers import Phi3Config


def test_su_rope_of_the_first_128k_checkpoints_loads():
    rope = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes = dict(hidden_size=16, num_attention_heads=2, max_position_embeddings=256, pad_token_id=0)
    config = Phi3Config(rope_scaling=rope, original_max_position_embeddings=32, **sizes)
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["original_max_position_embeddings"] == 32
