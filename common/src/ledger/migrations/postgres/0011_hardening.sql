-- Which ledger this is: messages carry it, so that a worker tells another ledger's task from a lost one.
CREATE TABLE ledger (
    id uuid NOT NULL PRIMARY KEY
);
INSERT INTO ledger (id) VALUES (gen_random_uuid());

-- The newest call that changed a task, as JSON: what it did, who made it, its request's id, when.
ALTER TABLE tasks ADD COLUMN last_change text;

-- Who has paused a queue or a schedule.
ALTER TABLE paused_queues ADD COLUMN paused_by text;
ALTER TABLE schedules ADD COLUMN paused_at bigint;
ALTER TABLE schedules ADD COLUMN paused_by text;
