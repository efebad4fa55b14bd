"""Device code of deepshare and its specification. Nothing here imports deepshare; native.py looks _C up by name."""
