"""Processes of a secure run on machines of their own: keys, mutual TLS, signs of life, server, client, dealer."""
