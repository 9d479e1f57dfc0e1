"""Studies: runs planned from one YAML file, their execution, and what their results say."""
