"""Small models, one for each way in which a layer's gradient is made, with inputs for them."""

import torch
from torch import nn
from torch.nn.utils import parametrizations


class OneLayer(nn.Module):
    """A layer, an in-place ReLU on its outputs, and a head."""

    def __init__(self, layer, inputs):
        super().__init__()
        self.layer, self.relu = layer, nn.ReLU(inplace=True)
        self.head = nn.Linear(layer(inputs).flatten(1).shape[1], 3)

    def forward(self, x):
        return self.head(self.relu(self.layer(x)).flatten(1))


def seen(layer, inputs):
    """A normalisation layer away from where it starts."""
    layer.train()(2 + 3 * inputs)
    for parameter in layer.parameters():
        parameter.data += torch.randn_like(parameter)
    return layer


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.relu_(self.again(self.first(x))))))


class Reader(nn.Module):
    """Embedding, LayerNorm, a parameter of its own, Linear over positions."""

    def __init__(self, padding=None):
        super().__init__()
        self.words = nn.Embedding(9, 6, padding_idx=padding)
        self.norm, self.mix, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.gate = nn.Parameter(torch.randn(6))

    def forward(self, x):
        found = self.norm(self.words(x))
        return self.head((self.mix(found) + self.gate * found).mean(1))


class TiedLinear(nn.Module):
    """Two layers of one kind that share all their parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class TiedWeight(nn.Module):
    """Two layers that share a weight, each with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class TiedEmbedding(nn.Module):
    """An output layer that shares the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.mix = nn.Embedding(4, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 4, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.words(x).mean(1))))


class Attention(nn.Module):
    """An encoder layer, whose attention has parameters that no layer of a known kind has."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Halves(nn.Module):
    """Writes into a view of a layer's outputs, and leaves another layer's outputs unused."""

    def __init__(self):
        super().__init__()
        self.both, self.unused, self.head = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, x):
        self.unused(x)
        both = self.both(x)
        left, right = both[:, :3], torch.tanh(both[:, 3:])
        left *= right
        return self.head(input=left)


def frozen(model, *names):
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)
    return model


def mlp(**options):
    return nn.Sequential(
        nn.Linear(7, 9, **options), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 3, **options)
    )


def _cases():
    torch.manual_seed(0)
    images, sequences = torch.randn(5, 4, 9, 7), torch.randn(5, 4, 11)
    vectors, words = torch.randn(5, 7), torch.randint(9, (5, 6))
    convolutions = {
        "plain": nn.Conv2d(4, 6, 3),
        "without bias": nn.Conv2d(4, 6, 3, bias=False),
        "stride": nn.Conv2d(4, 6, (3, 2), stride=(2, 3)),
        "padding": nn.Conv2d(4, 6, 3, padding=(1, 2)),
        "same": nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2)),
        "valid": nn.Conv2d(4, 6, 3, padding="valid"),
        "circular": nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
        "reflect": nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"),
        "dilation": nn.Conv2d(4, 6, (2, 3), dilation=(3, 2), padding=1),
        "groups": nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1),
        "depthwise": nn.Conv2d(4, 8, 3, groups=4),
        "depthwise without bias": nn.Conv2d(4, 4, 1, groups=4, bias=False),
        "one by one": nn.Conv2d(4, 6, 1),
    }
    norms = {
        "BatchNorm2d": seen(nn.BatchNorm2d(4), images),
        "GroupNorm": seen(nn.GroupNorm(2, 4), images),
        "LayerNorm over an image": seen(nn.LayerNorm((9, 7)), images),
        "LayerNorm without bias": seen(nn.LayerNorm(7, bias=False), images),
        "RMSNorm": seen(nn.RMSNorm(7), images),
    }
    made = {
        name: (OneLayer(layer, images), images) for name, layer in (convolutions | norms).items()
    }
    lines = {
        "Conv1d": nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        "Conv1d same": nn.Conv1d(4, 6, 4, padding="same", padding_mode="replicate"),
        "BatchNorm1d": seen(nn.BatchNorm1d(4), sequences),
        "Linear over positions": nn.Linear(11, 6),
        "Linear over few positions, without bias": nn.Linear(11, 2, bias=False),
    }
    made |= {name: (OneLayer(layer, sequences), sequences) for name, layer in lines.items()}
    bias_only = frozen(OneLayer(nn.Conv2d(4, 6, 3, groups=2), images), "layer.weight")
    flat = seen(nn.BatchNorm1d(7), vectors)
    return made | {
        "Linear": (mlp(), vectors),
        "Linear without bias": (mlp(bias=False), vectors),
        "BatchNorm1d of vectors": (nn.Sequential(flat, nn.Linear(7, 3)), vectors),
        "layer used twice": (Twice(), torch.randn(5, 4)),
        "Embedding and a raw parameter": (Reader(), words),
        "Embedding with padding": (Reader(padding=2), words),
        "tied layers": (TiedLinear(), torch.randn(5, 5)),
        "tied weight": (TiedWeight(), torch.randn(5, 5)),
        "tied embedding": (TiedEmbedding(), torch.randint(4, (5, 3))),
        "attention": (Attention(), torch.randn(5, 4, 6)),
        "views and unused outputs": (Halves(), torch.randn(5, 4)),
        "frozen weight": (frozen(mlp(), "0.weight", "3.bias"), vectors),
        "frozen weight of a convolution": (bias_only, images),
        "parametrised weights": (
            nn.Sequential(
                parametrizations.weight_norm(nn.Linear(7, 4)),
                parametrizations.spectral_norm(nn.Linear(4, 3)),
            ),
            vectors,
        ),
        "Bilinear": (PairOf(nn.Bilinear(3, 4, 3)), vectors),
        "Conv3d": (OneLayer(nn.Conv3d(1, 2, 2), images[:, None]), images[:, None]),
    }


class PairOf(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x[:, :3], x[:, 3:])


CASES = _cases()
