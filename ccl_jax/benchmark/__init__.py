"""How fast training, scoring and metrics are on the devices at hand, and the page that says so."""
