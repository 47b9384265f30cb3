"""Hundreds of prompts in one task, against a provider that is slow, flaky and rate-limited: a template."""
