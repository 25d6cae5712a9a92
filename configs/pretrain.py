"""An encoder learned from procedural images by `--job pretrain`, without any data set."""

from ml_collections import config_dict

from configs import default


def get_config(method: str = "rd_ccl") -> config_dict.ConfigDict:
    """Returns the config that encoder.weights="builtin" comes from; see its section `pretrain`."""
    config = default.get_config(method)
    config.name = "pretrain"
    config.model.encoder = "resnet18"
    return config
