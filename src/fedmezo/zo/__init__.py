"""The zeroth-order core: directions named by seeds, and the one place that writes weights."""
