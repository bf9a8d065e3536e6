-- Tasks that were submitted together, and the one that follows them.
CREATE TABLE task_groups (
    id          uuid   PRIMARY KEY,  -- version 7
    total       bigint NOT NULL,
    then_task   text   NOT NULL,     -- JSON
    then_id     uuid,                -- the task that followed
    completed   bigint,              -- the members' ends, as that task was told
    cancelled   bigint,
    discarded   bigint,
    created_at  bigint NOT NULL,
    finished_at bigint               -- null while the group is open
);

CREATE INDEX groups_open   ON task_groups (id)          WHERE finished_at IS NULL;
CREATE INDEX groups_closed ON task_groups (finished_at) WHERE finished_at IS NOT NULL;

ALTER TABLE tasks ADD COLUMN group_id uuid;

-- Only members pay for it. One probe finds an unfinished one, and it alone tells the counts.
CREATE INDEX tasks_group ON tasks (group_id, state, id) WHERE group_id IS NOT NULL;
