-- `tasks.priority`: 1 high, 0 normal, -1 low. Each queue has a lane for each, and each lane a watermark of its own:
-- `head_at` is that of the normal one. 0: nothing was delivered yet.
ALTER TABLE queues ADD COLUMN high_at bigint NOT NULL DEFAULT 0, ADD COLUMN low_at bigint NOT NULL DEFAULT 0;

DROP INDEX tasks_queued;
CREATE INDEX tasks_queued ON tasks (queue, priority, queued_at) INCLUDE (run_at) WHERE state = 2;
