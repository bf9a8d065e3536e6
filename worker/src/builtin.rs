//! Handlers from the settings file: programs and HTTP services.
