-- Messages published under a lower fence are void: the task was edited or moved after them. Null where none is.
ALTER TABLE tasks ADD COLUMN void_below bigint;

-- The failed task whose work this one does with other args.
ALTER TABLE tasks ADD COLUMN retried_from uuid;
