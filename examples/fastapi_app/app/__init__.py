"""A test bench for chat bots: the template of a multi-tenant application on rhesis-tasks."""
