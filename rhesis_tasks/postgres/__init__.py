"""PostgreSQL as Celery's result backend.  Knows nothing of BaseTask."""
