"""Models that are not ours, as their users have them: TorchRec's, two short ones in its style, and transformers.

Each takes a `Batch` of TorchRec and returns its loss and its scores, which is what TorchRec's pipelines ask of it.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain
from torchrec.models.experimental.transformerdlrm import DLRM_Transformer
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mlp import MLP
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

# B = users, L = events of a user, D = width, V = items

CPU, META = torch.device("cpu"), torch.device("meta")
USERS = 12  # of the global batch, dealt out to the ranks
LENGTH = 6
WIDTH = 16
NUM_ITEMS = 90


def _bags(prefix="", count=3):
    tables = [
        EmbeddingBagConfig(
            name=f"{prefix}t{i}", num_embeddings=50 + i, embedding_dim=WIDTH, feature_names=[f"{prefix}f{i}"]
        )
        for i in range(count)
    ]
    return EmbeddingBagCollection(tables=tables, device=META)


class DeepFMTrain(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = SimpleDeepFMNN(8, _bags(), hidden_layer_size=32, deep_fm_dimension=8)

    def forward(self, batch):
        scores = self.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        return nn.functional.binary_cross_entropy(scores, batch.labels), scores.detach()


class TwoTower(nn.Module):
    """A table and a perceptron for users, the same for items; the score is their product."""

    def __init__(self):
        super().__init__()
        self.user_tables, self.item_tables = _bags(count=1), _bags("i", count=1)
        self.user_tower, self.item_tower = MLP(WIDTH, [32, 8]), MLP(WIDTH, [32, 8])

    def forward(self, batch):
        user = self.user_tower(self.user_tables(batch.sparse_features).values())
        item = self.item_tower(self.item_tables(batch.sparse_features).values())
        scores = (user * item).sum(1)
        return nn.functional.binary_cross_entropy_with_logits(scores, batch.labels), scores.detach()


class BERT4Rec(nn.Module):
    """TorchRec's example in short: a bare table of positions, a two-dimensional norm and a head over all items."""

    def __init__(self):
        super().__init__()
        item = EmbeddingConfig(name="item", num_embeddings=NUM_ITEMS, embedding_dim=WIDTH, feature_names=["if0"])
        self.tables = EmbeddingCollection(tables=[item], device=META)
        self.positional = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layernorm = nn.LayerNorm([LENGTH, WIDTH])
        layer = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(WIDTH, NUM_ITEMS)

    def forward(self, batch):
        items_BLD = self.tables(batch.sparse_features)["if0"].values().view(-1, LENGTH, WIDTH)
        scores_BLV = self.out(self.blocks(self.layernorm(items_BLD + self.positional)))
        ids_BL = batch.sparse_features["if0"].values().view(-1, LENGTH)
        return nn.functional.cross_entropy(scores_BLV.flatten(0, 1), ids_BL.flatten()), scores_BLV.detach()


class Encoder(nn.Module):
    """torch's own transformer above torch's own table."""

    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, NUM_ITEMS, bias=False)

    def forward(self, batch):
        ids_BL = batch.sparse_features["if0"].values().view(-1, LENGTH)
        scores_BLV = self.head(self.encoder(self.items(ids_BL)))
        return nn.functional.cross_entropy(scores_BLV.flatten(0, 1), ids_BL.flatten()), scores_BLV.detach()


class LanguageModel(nn.Module):
    """A transformer of Hugging Face with random weights, which takes ids of items for ids of words."""

    def __init__(self, family):
        super().__init__()
        import transformers

        small = {"vocab_size": NUM_ITEMS, "max_position_embeddings": 32, "attention_dropout": 0.0}
        narrow = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        if family == "bert":
            config = transformers.BertConfig(
                **small, **narrow, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
            self.model = transformers.BertForMaskedLM(config)
        elif family == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=NUM_ITEMS, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            )  # fmt: skip
            self.model = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.LlamaConfig(**small, **narrow, num_key_value_heads=1)
            self.model = transformers.LlamaForCausalLM(config)

    def forward(self, batch):
        ids_BL = batch.sparse_features["if0"].values().view(-1, LENGTH)
        result = self.model(input_ids=ids_BL, labels=ids_BL)
        return result.loss, result.logits.detach()


def _dlrm(kind=DLRM, **settings):
    return DLRMTrain(kind(_bags(), 8, [32, WIDTH], [32, 1], **settings))


WITH_TABLES = {
    "dlrm": _dlrm,
    "dlrm-dcn": lambda: _dlrm(DLRM_DCN, dcn_num_layers=2, dcn_low_rank_dim=4),
    "dlrm-projection": lambda: _dlrm(
        DLRM_Projection, interaction_branch1_layer_sizes=[32, 32], interaction_branch2_layer_sizes=[32, 32]
    ),
    "dlrm-transformer": lambda: _dlrm(DLRM_Transformer, nhead=2, ntransformer_layers=2),
    "deepfm": DeepFMTrain,
    "two-tower": TwoTower,
    "bert4rec": BERT4Rec,
}
WITHOUT_TABLES = {
    "transformer-encoder": Encoder,
    "hf-bert": lambda: LanguageModel("bert"),
    "hf-gpt2": lambda: LanguageModel("gpt2"),
    "hf-llama": lambda: LanguageModel("llama"),
}
MODELS = WITH_TABLES | WITHOUT_TABLES


def make(name):
    """An unsharded model without dropout; its tables are on the meta device."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def share(step, device=CPU):
    """This rank's share of the global batch of a step: the same users for any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    ids = {f"f{i}": torch.randint(0, 50, (USERS, 2), generator=generator) for i in range(3)}
    ids["if0"] = torch.randint(0, 50, (USERS, LENGTH), generator=generator)
    dense = torch.randn(USERS, 8, generator=generator)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * USERS // num_ranks, (rank + 1) * USERS // num_ranks)
    mine_of = {key: value[mine] for key, value in ids.items()}
    features = KeyedJaggedTensor(
        keys=list(ids),
        values=torch.cat([value.flatten() for value in mine_of.values()]),
        lengths=torch.cat([torch.full((len(value),), value.shape[1]) for value in mine_of.values()]),
    )
    return Batch(dense_features=dense[mine], sparse_features=features, labels=(dense[mine, 0] > 0).float()).to(
        device=device
    )


def shard(name, wrapper=None, sharding="table_wise", optimizer=RowWiseAdagrad, kernel="fused"):
    """As TorchRec's examples do it; nothing of muonrec but the wrapper."""
    model = make(name)
    tables = [p for n, p in model.named_parameters() if p.is_meta]
    if optimizer is not None:
        _apply_optimizer_in_backward(optimizer, tables, {"lr": 0.05})
    names = [n.split(".")[-2] for n, p in model.named_parameters() if p.is_meta]
    constraints = {n: ParameterConstraints(sharding_types=[sharding], compute_kernels=[kernel]) for n in names}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    sharders = get_default_sharders()
    plan = EmbeddingShardingPlanner(topology=topology, constraints=constraints).plan(model, sharders)
    settings = {} if wrapper is None else {"data_parallel_wrapper": wrapper}
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders, **settings)
