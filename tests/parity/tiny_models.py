"""Tiny networks and pipelines of diffusers and transformers, drawn at random."""

import io
import zlib

import numpy as np
import pytest
import sentencepiece

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPT, NEGATIVE = "a cat  dancing on the moon &amp; stars", "static, blurred details"
DIT = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "ffn_dim": 80,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
VAE = {"base_dim": 6, "z_dim": 16}
VAE_2_2 = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.1] * 48,
    "latents_std": [0.8] * 48,
}
IMAGE_WIDTH = 24


def draw(name, *shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.normal(size=shape).astype(np.float32)


def filled(model, salt=""):
    """Every parameter drawn at random, heads scaled clear of the clamps."""
    for name, value in model.state_dict().items():
        if not torch.is_floating_point(value):
            continue
        drawn = draw(salt + name, *value.shape)
        if name.endswith(("gamma", "norm.weight")):
            drawn = 1 + 0.2 * drawn
        elif name.endswith("bias") or "table" in name or "pos_embed" in name:
            drawn = 0.3 * drawn
        elif value.ndim > 1:
            drawn = drawn / np.sqrt(np.prod(value.shape[1:]))
        else:
            drawn = 1 + 0.2 * drawn
        if "decoder.conv_out" in name:
            drawn = drawn * 0.1
        value.copy_(torch.from_numpy(np.asarray(drawn, np.float32)))
    return model.eval()


def tokenizer():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{PROMPT} {NEGATIVE}", "two dogs in the snow"] * 5),
        model_writer=model,
        vocab_size=64,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    made = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(made.vocab_size())
    vocab = [(made.id_to_piece(i), made.get_score(i)) for i in pieces]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def text_config(vocab_size):
    return transformers.UMT5Config(
        vocab_size=vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def text_encoder(vocab_size):
    config = text_config(vocab_size)
    config._attn_implementation = "eager"
    return filled(transformers.UMT5EncoderModel(config))


def image_encoder():
    config = transformers.CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    config._attn_implementation = "eager"
    return filled(transformers.CLIPVisionModel(config))


def pipeline(kind, shift, vae=VAE, experts=None, **parts):
    """A tiny pipeline of a kind; `experts` is the boundary between two of them."""
    words = tokenizer()
    pictures = kind is diffusers.WanImageToVideoPipeline
    network = diffusers.WanTransformer3DModel
    if kind is diffusers.WanVACEPipeline:
        network = diffusers.WanVACETransformer3DModel
    options = DIT | parts.pop("dit", {})
    more = {"transformer": filled(network(**options))}
    if experts is not None:
        more["transformer_2"] = filled(network(**options), salt="low")
        more["boundary_ratio"] = experts
    if pictures and options.get("image_dim"):
        more["image_encoder"] = image_encoder()
        more["image_processor"] = transformers.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    pipe = kind(
        tokenizer=words,
        text_encoder=text_encoder(words.vocab_size),
        vae=filled(diffusers.AutoencoderKLWan(**vae)),
        scheduler=scheduler,
        **more,
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(name, *shape):
    return (255 * np.abs(np.sin(draw(name, *shape, 3)))).astype(np.uint8)
