//! What a database holds already: this ledger, that of an earlier release, or somebody else's tables.
//!
//! Everything of ours is in the schema `tasklane`. Up to version 10 it was wherever the search path led, next to the
//! application's own tables, which may well be called `tasks` or `schema_version`. So a ledger is recognised by all of
//! its tables and a function that nobody else has, never by a version number alone.

use sqlx::{AssertSqlSafe, PgConnection};

use super::fault::Fault;
use crate::ledger::{LedgerError, SCHEMA_VERSION};

/// The schema that holds the ledger.
pub(super) const SCHEMA: &str = "tasklane";
/// The last version that was kept in the search path.
pub(super) const UNSCHEMED: i64 = 10;
/// The function that tells the time, up to that version: no other software has one of this name.
const OLD_CLOCK: &str = "tasklane_now()";

/// A table, the version that brought it, and columns that tell it from others of its name.
struct Table {
    name: &'static str,
    since: i64,
    columns: &'static [&'static str],
}

const fn table(name: &'static str, since: i64, columns: &'static [&'static str]) -> Table {
    Table { name, since, columns }
}

const TABLES: [Table; 13] = [
    table("schema_version", 1, &["version bigint"]),
    table("tasks", 1, &["id uuid", "kind text", "state smallint", "fence bigint", "due_at bigint", "worker_id uuid"]),
    table("workers", 1, &["id uuid", "kinds text[]", "expires_at bigint", "dead boolean"]),
    table("queues", 1, &["name text", "head_at bigint"]),
    table("schedules", 3, &["name text", "revision uuid", "next_at bigint", "last_tick bigint"]),
    table("unique_keys", 4, &["key text", "task_id uuid", "until_at bigint"]),
    table("paused_queues", 5, &["name text", "paused_at bigint"]),
    table("task_groups", 6, &["id uuid", "then_task text", "then_id uuid"]),
    table("limits", 8, &["scope text", "rate_per_ms bigint", "origin smallint"]),
    table("limit_places", 8, &["scope text", "task_id uuid", "fence bigint"]),
    table("limit_gates", 8, &["scope text", "next_us bigint", "turn text"]),
    table("queue_retention", 10, &["name text", "retention_ms bigint"]),
    table("ledger", 11, &["id uuid"]),
];

/// The function that the ledger's statements ask for the time, in the schema.
const CLOCK: &str = "now_ms";

/// What was found, surely.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Layout {
    /// No ledger.
    None,
    /// A ledger of version 10 or older, in this schema.
    Earlier { schema: String, version: i64 },
    /// The ledger, in its own schema.
    Current { version: i64 },
}

impl Layout {
    pub(crate) const fn version(&self) -> i64 {
        match self {
            Self::None => 0,
            Self::Earlier { version, .. } | Self::Current { version } => *version,
        }
    }
}

/// A table or the like in one of the schemas that matter, with its columns as `name type`.
#[derive(Debug, Clone)]
struct Relation {
    schema: String,
    name: String,
    owned: bool,
    columns: Vec<String>,
}

/// What the catalogue says.
#[derive(Debug, Clone, Default)]
struct Catalogue {
    database: String,
    user: String,
    /// Whether the schema is there, and what the user may do in it.
    exists: bool,
    may_use: bool,
    may_create: bool,
    /// Whether the user may make a schema.
    may_create_schemas: bool,
    /// Whether the schema has our clock.
    clock: bool,
    /// The schema where the search path finds the clock of an earlier release.
    earlier: Option<String>,
    relations: Vec<Relation>,
}

/// How far the versions are to be trusted: only of a table that was recognised.
struct Versions {
    here: Option<i64>,
    earlier: Option<i64>,
}

const ASK: &str = "
SELECT current_database()::text, current_user::text, n.oid IS NOT NULL,
       COALESCE(has_schema_privilege(n.oid, 'USAGE'), false), COALESCE(has_schema_privilege(n.oid, 'CREATE'), false),
       has_database_privilege(current_database(), 'CREATE'),
       EXISTS (SELECT 1 FROM pg_proc p WHERE p.pronamespace = n.oid AND p.proname = $2 AND p.pronargs = 0),
       (SELECT o.nspname::text FROM pg_proc p JOIN pg_namespace o ON o.oid = p.pronamespace
        WHERE p.oid = to_regprocedure($3))
FROM (SELECT 1) one LEFT JOIN pg_namespace n ON n.nspname = $1";

/// All there is in the schema, and what has the names of our tables where the earlier clock is.
const RELATIONS: &str = "
SELECT n.nspname::text, c.relname::text, pg_has_role(c.relowner, 'USAGE'),
       ARRAY(SELECT a.attname || ' ' || format_type(a.atttypid, NULL) FROM pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum)
FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND (n.nspname = $1 OR n.nspname = $2 AND c.relname = ANY($3))
ORDER BY c.relname";

/// Looks, and changes nothing.
///
/// # Errors
/// [`LedgerError::Unsuitable`] where something is in the way, or what is there is not surely ours.
pub(super) async fn look(connection: &mut PgConnection) -> Result<Layout, LedgerError> {
    let catalogue = read(connection).await?;
    let mut versions = Versions { here: None, earlier: None };
    if catalogue.may_use && catalogue.has(SCHEMA, &TABLES[0]) {
        versions.here = Some(version_in(connection, SCHEMA).await?);
    }
    if let Some(earlier) = catalogue.earlier.as_deref().filter(|schema| catalogue.has(schema, &TABLES[0])) {
        versions.earlier = Some(version_in(connection, earlier).await?);
    }
    catalogue.judge(&versions).map_err(LedgerError::Unsuitable)
}

async fn read(connection: &mut PgConnection) -> Result<Catalogue, Fault> {
    type Row = (String, String, bool, bool, bool, bool, bool, Option<String>);
    let (database, user, exists, may_use, may_create, may_create_schemas, clock, earlier): Row =
        sqlx::query_as(ASK).bind(SCHEMA).bind(CLOCK).bind(OLD_CLOCK).fetch_one(&mut *connection).await?;
    let rows: Vec<(String, String, bool, Vec<String>)> = sqlx::query_as(RELATIONS)
        .bind(SCHEMA)
        .bind(&earlier)
        .bind(TABLES.iter().map(|table| table.name).collect::<Vec<_>>())
        .fetch_all(connection)
        .await?;
    let relation = |(schema, name, owned, columns)| Relation { schema, name, owned, columns };
    let relations = rows.into_iter().map(relation).collect();
    Ok(Catalogue { database, user, exists, may_use, may_create, may_create_schemas, clock, earlier, relations })
}

async fn version_in(connection: &mut PgConnection, schema: &str) -> Result<i64, Fault> {
    let sql = format!("SELECT coalesce(max(version), 0) FROM {}.schema_version", quoted(schema));
    Ok(sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(connection).await?)
}

/// A name as it stands in SQL.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The tables that a ledger of this version has, but for the one that tells the version.
pub(super) fn tables_of(version: i64) -> impl Iterator<Item = &'static str> {
    TABLES.iter().skip(1).filter(move |table| table.since <= version).map(|table| table.name)
}

impl Catalogue {
    fn relation(&self, schema: &str, name: &str) -> Option<&Relation> {
        self.relations.iter().find(|relation| relation.schema == schema && relation.name == name)
    }

    /// Whether the table is there, and ours.
    fn has(&self, schema: &str, table: &Table) -> bool {
        let ours = |relation: &Relation| {
            let all = table.columns.iter().all(|column| relation.columns.iter().any(|found| found == column));
            // An application's table of this name has more to say than a number.
            all && (table.name != "schema_version" || relation.columns.len() == 1)
        };
        self.relation(schema, table.name).is_some_and(ours)
    }

    fn judge(&self, versions: &Versions) -> Result<Layout, String> {
        let here = if self.clock { Some(self.current(versions.here)?) } else { None };
        match (here, &self.earlier) {
            (Some(_), Some(earlier)) if earlier != SCHEMA => Err(self.two_ledgers(earlier)),
            (Some(version), _) => Ok(Layout::Current { version }),
            (None, Some(earlier)) => self.earlier(earlier, versions.earlier),
            (None, None) => self.room().map(|()| Layout::None),
        }
    }

    /// The version of the ledger whose clock is in the schema.
    fn current(&self, version: Option<i64>) -> Result<i64, String> {
        if !self.may_use {
            return Err(format!(
                "the user {0} may not use the schema tasklane of the database {1}: GRANT USAGE ON SCHEMA tasklane \
                 TO {0}, and all rights on its tables, or connect as their owner",
                self.user, self.database
            ));
        }
        let version = version.filter(|version| *version > UNSCHEMED);
        let known = version.unwrap_or(UNSCHEMED);
        // What a newer release has made of the tables is its own affair.
        let looks = TABLES.iter().filter(|table| table.since <= known && known <= SCHEMA_VERSION);
        let strange = looks.into_iter().find(|table| !self.has(SCHEMA, table));
        let (Some(version), None) = (version, strange) else {
            return Err(format!(
                "the schema tasklane of the database {} is not a whole ledger: its table {} is missing, or is \
                 another's. Restore it from a backup, or rename the schema (ALTER SCHEMA tasklane RENAME TO …)",
                self.database,
                strange.map_or("schema_version", |table| table.name)
            ));
        };
        if version < SCHEMA_VERSION {
            self.may_migrate(SCHEMA, version)?;
        }
        Ok(version)
    }

    /// Whether the tables of a ledger may be altered, and others added.
    fn may_migrate(&self, schema: &str, version: i64) -> Result<(), String> {
        let foreign =
            tables_of(version).filter_map(|name| self.relation(schema, name)).find(|relation| !relation.owned);
        match foreign {
            Some(Relation { name, .. }) => Err(format!(
                "the ledger in the schema {schema} is of version {version} and is to become {SCHEMA_VERSION}, but its \
                 table {name} does not belong to the user {}: start once as its owner",
                self.user
            )),
            None if schema == SCHEMA => self.may_make_tables(),
            None => Ok(()),
        }
    }

    /// The ledger of an earlier release, if it surely is one.
    fn earlier(&self, schema: &str, version: Option<i64>) -> Result<Layout, String> {
        let version = version.filter(|version| (1..=UNSCHEMED).contains(version));
        let known = version.unwrap_or(1);
        let strange = TABLES.iter().find(|table| table.since <= known && !self.has(schema, table));
        let (Some(version), None) = (version, strange) else {
            return Err(format!(
                "the function tasklane_now() in the schema {schema} of the database {} is a ledger's of an earlier \
                 release, but the table {schema}.{} is not: move another application's table elsewhere, or drop what \
                 is left of the ledger, or give the ledger a database of its own",
                self.database,
                strange.map_or("schema_version", |table| table.name)
            ));
        };
        self.may_migrate(schema, version)?;
        if schema != SCHEMA {
            self.room()?;
        }
        Ok(Layout::Earlier { schema: schema.to_owned(), version })
    }

    /// Whether a ledger can be made, or moved here.
    fn room(&self) -> Result<(), String> {
        let Self { database, user, .. } = self;
        if let Some(Relation { name, .. }) = self.relations.iter().find(|relation| relation.schema == SCHEMA) {
            return Err(format!(
                "the schema tasklane of the database {database} holds {name}, which is not the ledger's: rename that \
                 schema (ALTER SCHEMA tasklane RENAME TO …), or give the ledger a database of its own"
            ));
        }
        if !self.exists && !self.may_create_schemas {
            return Err(format!(
                "the user {user} may not make the schema tasklane in the database {database}: \
                 CREATE SCHEMA tasklane AUTHORIZATION {user}, or GRANT CREATE ON DATABASE {database} TO {user}"
            ));
        }
        self.may_make_tables()
    }

    fn may_make_tables(&self) -> Result<(), String> {
        if !self.exists || (self.may_use && self.may_create) {
            return Ok(());
        }
        Err(format!(
            "the user {0} may not make tables in the schema tasklane of the database {1}: \
             GRANT USAGE, CREATE ON SCHEMA tasklane TO {0}",
            self.user, self.database
        ))
    }

    fn two_ledgers(&self, earlier: &str) -> String {
        format!(
            "the database {} holds two ledgers: one in the schema tasklane, and one of an earlier release in the \
             schema {earlier}. A database holds one: give each its own, or drop the one in {earlier} if nothing in it \
             is needed",
            self.database
        )
    }
}
