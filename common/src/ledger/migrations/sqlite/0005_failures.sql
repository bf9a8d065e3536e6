-- When somebody last changed the task while it waited: messages published before may say otherwise, so a claim tells the
-- args, and asks which queue the delivery came from. Null for most.
ALTER TABLE tasks ADD COLUMN edited_at INTEGER;

-- The failed task whose work this one does with other args.
ALTER TABLE tasks ADD COLUMN retried_from BLOB;
