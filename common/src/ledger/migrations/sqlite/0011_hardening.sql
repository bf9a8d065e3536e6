-- Which ledger this is: messages carry it, so that a worker tells another ledger's task from a lost one.
CREATE TABLE ledger (
    id BLOB NOT NULL PRIMARY KEY
) WITHOUT ROWID;
INSERT INTO ledger (id) VALUES (randomblob(16));

-- The newest call that changed a task, as JSON: what it did, who made it, its request's id, when.
ALTER TABLE tasks ADD COLUMN last_change TEXT;

-- Who has paused a queue or a schedule.
ALTER TABLE paused_queues ADD COLUMN paused_by TEXT;
ALTER TABLE schedules ADD COLUMN paused_at INTEGER;
ALTER TABLE schedules ADD COLUMN paused_by TEXT;

-- What the args are told by: a message that has others starts nothing. Null where an earlier release has recorded them.
ALTER TABLE tasks ADD COLUMN args_digest INTEGER;
-- How many ticks of a schedule were skipped since one was fired.
ALTER TABLE schedules ADD COLUMN skipped_in_a_row INTEGER NOT NULL DEFAULT 0;

-- What an operator calls a worker and finds it by, and when and how it went.
ALTER TABLE workers ADD COLUMN name TEXT;
ALTER TABLE workers ADD COLUMN pid INTEGER;
ALTER TABLE workers ADD COLUMN ended_at INTEGER;
ALTER TABLE workers ADD COLUMN ended INTEGER;
