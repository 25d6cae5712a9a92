"""The recipe of configs/mvtec.py on VisA: --config.data.root=/path/to/VisA_20220922."""

from ml_collections import config_dict

from configs import default


def get_config(method: str = "rd_ccl") -> config_dict.ConfigDict:
    """Returns that recipe, on VisA as published or converted to 1cls."""
    config = default.get_config(method)
    config.name = "visa"
    config.data.layout = "visa"
    config.data.name = "visa"
    config.data.root = "data/VisA_20220922"
    return config
