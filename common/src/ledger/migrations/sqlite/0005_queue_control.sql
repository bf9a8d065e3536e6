-- Queues of which no task may start; empty nearly always.
CREATE TABLE paused_queues (
    name      TEXT    NOT NULL PRIMARY KEY,
    paused_at INTEGER NOT NULL
) WITHOUT ROWID;
