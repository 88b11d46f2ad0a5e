"""Published training recipes as YAML files, installed as ``upt_fast.configs`` (upt_fast/train/recipes.py)."""
