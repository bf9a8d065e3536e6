-- Tasks that were submitted together, and the one that follows them.
CREATE TABLE task_groups (
    id          BLOB    PRIMARY KEY,  -- UUID v7
    total       INTEGER NOT NULL,
    then_task   TEXT    NOT NULL,     -- JSON
    then_id     BLOB,                 -- the task that followed
    completed   INTEGER,              -- the members' ends, as that task was told
    cancelled   INTEGER,
    discarded   INTEGER,
    created_at  INTEGER NOT NULL,
    finished_at INTEGER               -- null while the group is open
) WITHOUT ROWID;

CREATE INDEX groups_open   ON task_groups (id)          WHERE finished_at IS NULL;
CREATE INDEX groups_closed ON task_groups (finished_at) WHERE finished_at IS NOT NULL;

ALTER TABLE tasks ADD COLUMN group_id BLOB;

-- Only members pay for it. One probe finds an unfinished one, and it alone tells the counts.
CREATE INDEX tasks_group ON tasks (group_id, state, id) WHERE group_id IS NOT NULL;
