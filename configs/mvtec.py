"""The published RD+CCL recipe on MVTec AD: --config.data.root=/path/to/mvtec_anomaly_detection."""

from ml_collections import config_dict

from configs import default


def get_config(method: str = "rd_ccl") -> config_dict.ConfigDict:
    """Returns the recipe of the first release (200 epochs, two-view supervised contrastive)."""
    config = default.get_config(method)
    config.name = "mvtec"
    config.data.name = "mvtec"
    config.data.root = "data/mvtec_anomaly_detection"
    return config
