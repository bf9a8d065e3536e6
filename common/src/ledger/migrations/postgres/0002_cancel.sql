-- Somebody wants a running task cancelled since then; its reason is in `reason`. Of one that is cancelled, when that
-- was asked; null when its handler said stop.
ALTER TABLE tasks ADD COLUMN cancel_requested_at bigint;

-- Asked by every lease renewal, and empty nearly always.
CREATE INDEX tasks_cancelling ON tasks (worker_id) INCLUDE (id, fence)
    WHERE state = 3 AND cancel_requested_at IS NOT NULL;
