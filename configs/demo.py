"""The generated benchmark with a small encoder: minutes on two CPU cores."""

from ml_collections import config_dict

from configs import default


def get_config(method: str = "rd_ccl") -> config_dict.ConfigDict:
    """Returns the demo config."""
    config = default.get_config(method)
    config.name = "demo"
    config.data.layout = "synthetic"
    config.data.root = "data/synthetic"
    config.data.image_size = 128
    config.encoder.weights = "builtin"
    config.model.encoder = "resnet18"
    config.train.steps = 260
    config.train.checkpoint_every = 100
    config.optimizer.decay_at = 0.8  # so few steps gain more by it than by a constant rate
    config.eval.batch_size = 32
    config.eval.smoothing_sigma = 2.0  # pixels; 4 at 256 pixels, the published recipe's size
    return config
