"""What is trained on every grid and compared with one process."""

from support.parity import check_equal, check_near, on_each_grid
from support.steps import tiny_grid, train_tiny

STEPS = 3
ADAFACTOR = {"name": "adafactor", "gradient_clip": 0.0}
RANK_BY_RANK = {"micro_batch_size": 2}  # what ranks or remembers tokens of one rank's micro-batch
VARIANTS = {
    "adamw": {},
    "untied-swiglu-dropless": {
        "model": {"tie_embeddings": False, "activation": "swiglu", "num_layers": 5},  # stages of 3 and 2
        "routing": {"capacity_factor": None},
    },
    "adafactor": {"optimizer": ADAFACTOR},
    "router-rate": {"optimizer": ADAFACTOR, "routing": {"router_learning_rate": 2.0}},
    "quantile": {"routing": {"router": "quantile"}, "training": RANK_BY_RANK},
    "quantile-running": {
        "routing": {"router": "quantile", "quantile_from": "running", "eval_density": 0.3},
        "training": RANK_BY_RANK,
    },
    "mixture-of-depths": {
        "routing": {
            "router": "topk", "stand_in": "predictor", "stand_in_weight": 0.5, "z_loss_weight": 0.1,
            "keys_values": "executed", "group_size": None, "density": 0.4, "eval_density": 0.3,
        },
        "training": RANK_BY_RANK,
    },
    "coefficient": {"routing": {"density_control": "coefficient", "coefficient_rate": 2.0}},
    "bias-mlp": {
        "routing": {"router": "sigmoid", "density_control": "bias", "bias_rate": 1.0, "wrap": "mlp"},
        "training": RANK_BY_RANK,
    },
    "random-attention": {"routing": {"router": "random", "wrap": "attention", "density": 0.3}},
    "ranked": {
        "routing": {
            "router": "topk", "update_weight": "straight_through", "z_loss_weight": 0.1,
            "eval_density": 0.4, "eval_capacity_factor": 1.0,
        },
        "training": RANK_BY_RANK,
    },
    "dense-gradient": {"routing": {"gradient": "dense", "router": "sigmoid"}},
    # twice as many micro-batches as stages: with fewer, all are in flight at once
    "deep": {
        "model": {"num_layers": 8},
        "routing": {"density_control": "coefficient"},
        "training": {"micro_batch_size": 1, "eval_sequences": 8},
    },
    # a coin decides, not a rounding
    "bf16": {"routing": {"router": "random"}, "training": {"precision": "bf16"}},
    # weights that stay: every step shows what one pass rounds, not where roundings have led the weights
    "bf16-still": {
        "routing": {"router": "random"}, "training": {"precision": "bf16"},
        "optimizer": {"learning_rate": 1e-12},
    },
    "many-heads": {"model": {"num_attention_heads": 4, "num_key_value_heads": 4}},
    "recompute": {"training": {"recompute": "full"}},
    "recompute-cheap": {"training": {"recompute": "cheap"}},
    "recompute-attention": {"training": {"recompute": "attention"}},
    "warmup": {"routing": {"router": "quantile", "density_warmup_steps": 2}, "training": RANK_BY_RANK},
}  # fmt: skip


def train(grid, parallel, variant):
    return train_tiny(grid, parallel, STEPS, VARIANTS[variant])


def train_all(grids):
    return on_each_grid(grids, train)


def train_alone(variants):
    with tiny_grid({}) as grid:
        return {variant: train(grid, {}, variant) for variant in variants}


def check(name, one_process, processes):
    variant = name.split()[1]
    for results in processes:
        if variant.startswith("bf16"):
            check_near(results[name], one_process[variant], still=variant == "bf16-still")
        else:
            check_equal(results[name], one_process[variant])
