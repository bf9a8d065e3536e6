-- When the task could first have started, kept by its first claim; a replay begins anew. Its age counts from then.
ALTER TABLE tasks ADD COLUMN first_due_at bigint;
