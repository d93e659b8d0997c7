"""Models whose layers tests look for: tiny transformers, a plain CNN, and one that runs its blocks backwards."""

import transformers
from torch import nn

SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 40}
T5 = {"vocab_size": 99, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0}


def classifier(config):
    return transformers.AutoModelForSequenceClassification.from_config(config)


def bert():
    return classifier(transformers.BertConfig(**SMALL))


def tiny_albert():
    return classifier(transformers.AlbertConfig(**SMALL, embedding_size=8))


def tiny_t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


def names(layers):
    return [layer.name for layer in layers]


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class Backwards(nn.Module):
    """Runs its blocks in the opposite of registration order, and never runs the auxiliary head."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(8, 2)
        self.fc = nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = self.conv(x)
        for block in reversed(self.blocks):
            x = block(x)
        return self.fc(x.mean((2, 3)))
