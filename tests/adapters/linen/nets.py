"""Models as Flax's documentation writes them: a vision transformer and a decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(num_heads=2)(y, y, deterministic=not train)
        y = nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))
        return x + nn.Dense(8)(y)


class ViT(nn.Module):
    """Patches by a convolution, a class token, positions, blocks, a head."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Conv(8, (4, 4), strides=4, name="patches")(images)
        x = x.reshape(x.shape[0], -1, 8)
        token = self.param("token", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], 1)
        x += nn.Embed(x.shape[1], 8, name="positions")(jnp.arange(x.shape[1]))[None]
        for index in range(2):
            x = EncoderBlock(name=f"block_{index}")(x, train)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x[:, 0]))


class DecoderBlock(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        mask = nn.make_causal_mask(x[..., 0])
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(2)(y, mask=mask, deterministic=not train)
        x += nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(8, name="down")(y), None


class Decoder(nn.Module):
    """A language model whose head is its embedding; its layers are scanned and recomputed."""

    scanned: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, ids, train: bool = False):
        embed = nn.Embed(11, 8, name="embed")
        x = embed(ids)
        block = nn.remat(DecoderBlock, static_argnums=(2,))
        if self.scanned:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=3,
            )
            x, _ = stack(self.dropout, name="layers")(x, train)
        else:
            for index in range(3):
                x, _ = block(self.dropout, name=f"layers_{index}")(x, train)
        return embed.attend(nn.LayerNorm(name="norm")(x))


def ids_of(*shape):
    return jax.random.randint(jax.random.key(4), shape, 0, 11)


def loss_fn(model, batch):
    """The sum of the losses of the next tokens, where there is one, and their count."""
    logits = model(batch["ids"][..., :-1], train=True)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["ids"][..., 1:])
    weights = batch["weights"]
    return (nll * weights).sum(), weights.sum()


def batch_of(micro, rows):
    """Returns a batch whose micro-batches have different counts."""
    ids = ids_of(micro, rows, 6)
    weights = (jax.random.uniform(jax.random.key(6), (micro, rows, 5)) < 0.7).astype(jnp.float32)
    return {"ids": ids, "weights": weights}
