-- Who holds a unique key, or held it last: nobody, once that task has finished and the window, if there is one, is over.
CREATE TABLE unique_keys (
    key      TEXT NOT NULL PRIMARY KEY,
    task_id  BLOB NOT NULL,
    until_at INTEGER          -- the end of the window; null: until the task has finished
) WITHOUT ROWID;
