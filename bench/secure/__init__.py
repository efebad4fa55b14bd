"""What bench/secure_table6 and bench/peers/run.py stand on: networks, links between two processes, cells, tables."""
