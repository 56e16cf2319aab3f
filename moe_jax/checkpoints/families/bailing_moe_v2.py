"""Ling 2.0 and Ring 2.0 (Ant Group, arXiv:2510.22115): sigmoid router with selection bias and group limit."""

from moe_jax.checkpoints.families import bailing_moe

SOURCES = bailing_moe.SOURCES
read = bailing_moe.read
