//! PostgreSQL (being written).
/// Stand-in until the real one is committed.
pub struct PostgresLedger;
impl PostgresLedger {
    /// Refuses.
    pub async fn connect(_url: &str) -> Result<super::sqlite::SqliteLedger, super::LedgerError> {
        Err(super::LedgerError::Unsuitable("not yet".to_owned()))
    }
}
