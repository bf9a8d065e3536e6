use super::*;
use clap::CommandFactory;
use clap::error::ErrorKind;

fn parse(line: &str) -> Result<Cli, ErrorKind> {
    Cli::try_parse_from(line.split(' ')).map_err(|error| error.kind())
}

#[test]
fn the_command_line_makes_sense() {
    Cli::command().debug_assert();
}

#[test]
fn help() {
    let mut command = Cli::command().term_width(100);
    command.build();
    let mut text = command.render_long_help().to_string();
    for subcommand in command.get_subcommands_mut().filter(|command| command.get_name() != "help") {
        let mut subcommand = subcommand.clone().term_width(100);
        let help = subcommand.render_help();
        text.push_str(&format!("\n==== {}\n\n{help}", subcommand.get_name()));
        for inner in subcommand.get_subcommands().filter(|command| command.get_name() != "help") {
            let help = inner.clone().term_width(100).render_help();
            text.push_str(&format!("\n==== {} {}\n\n{help}", subcommand.get_name(), inner.get_name()));
        }
    }
    let trimmed: Vec<_> = text.lines().map(str::trim_end).collect();
    insta::assert_snapshot!(trimmed.join("\n"));
}

#[test]
fn a_submission_as_in_the_manual() {
    let line =
        "tasklane submit report.build month=2026-11 dry=true --queue reports --delay 5m --tag team=blue --wait 30s";
    let Command::Submit(submit) = parse(line).unwrap().command else { panic!("another command") };
    assert_eq!((submit.task.kind.as_str(), submit.task.pairs.len(), submit.task.tags.len()), ("report.build", 2, 1));
    assert_eq!((submit.delay, submit.wait), (Some(Duration::from_secs(300)), Some(Duration::from_secs(30))));
    let Command::Submit(submit) = parse("tasklane submit mail --args -").unwrap().command else { panic!("another") };
    assert_eq!(submit.task.args.as_deref(), Some("-"));
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (line, kind) in [
        ("tasklane submit a x=1 --args {}", ErrorKind::ArgumentConflict),
        ("tasklane submit a --delay 1s --at 2030-01-31T08:00:00Z", ErrorKind::ArgumentConflict),
        ("tasklane submit a --delay 5", ErrorKind::ValueValidation),
        ("tasklane submit a word", ErrorKind::ValueValidation),
        ("tasklane get", ErrorKind::MissingRequiredArgument),
        ("tasklane get nonsense", ErrorKind::ValueValidation),
        ("tasklane group nonsense", ErrorKind::ValueValidation),
        ("tasklane edit - --delay 1s", ErrorKind::ValueValidation),
        ("tasklane get x", ErrorKind::ValueValidation),
        ("tasklane edit 01a20751-1f82-705d-a198-4567bb46f288", ErrorKind::MissingRequiredArgument),
        (
            "tasklane edit 01a20751-1f82-705d-a198-4567bb46f288 --delay 1s --at 2030-01-31T08:00:00Z",
            ErrorKind::ArgumentConflict,
        ),
        ("tasklane cancel", ErrorKind::MissingRequiredArgument),
        ("tasklane cancel 01a20751-1f82-705d-a198-4567bb46f288 --kind a", ErrorKind::ArgumentConflict),
        ("tasklane cancel 01a20751-1f82-705d-a198-4567bb46f288 --dry-run", ErrorKind::ArgumentConflict),
        ("tasklane retry", ErrorKind::MissingRequiredArgument),
        ("tasklane retry 01a20751-1f82-705d-a198-4567bb46f288 --per-second 5", ErrorKind::ArgumentConflict),
        ("tasklane retry --kind a --per-second 0", ErrorKind::ValueValidation),
        ("tasklane list --state done", ErrorKind::InvalidValue),
        ("tasklane list --all --limit 3", ErrorKind::ArgumentConflict),
        ("tasklane batch --chunk 0", ErrorKind::ValueValidation),
        ("tasklane batch --chunk 5 --then a", ErrorKind::ArgumentConflict),
        ("tasklane batch --then-args 1", ErrorKind::MissingRequiredArgument),
        ("tasklane queues ..", ErrorKind::ValueValidation),
        ("tasklane purge 01a20751-1f82-705d-a198-4567bb46f288", ErrorKind::UnknownArgument),
        ("tasklane move default", ErrorKind::MissingRequiredArgument),
        ("tasklane pause", ErrorKind::MissingRequiredArgument),
        ("tasklane resume a/../b", ErrorKind::ValueValidation),
        ("tasklane workers --url nowhere", ErrorKind::ValueValidation),
        ("tasklane tail --state done", ErrorKind::InvalidValue),
        ("tasklane tail --count 0", ErrorKind::ValueValidation),
        ("tasklane schedules put a mail", ErrorKind::MissingRequiredArgument),
        ("tasklane schedules put a mail --cron @daily --delay 1s", ErrorKind::UnknownArgument),
        ("tasklane schedules put a/b mail --cron @daily", ErrorKind::ValueValidation),
        ("tasklane schedules put a mail --cron @daily --overlap maybe", ErrorKind::InvalidValue),
        ("tasklane limits set queue default", ErrorKind::MissingRequiredArgument),
        ("tasklane limits set tag a --max-running 5", ErrorKind::InvalidValue),
        ("tasklane limits set key .. --max-running 5", ErrorKind::ValueValidation),
        ("tasklane limits set queue default --rate fast", ErrorKind::ValueValidation),
        ("tasklane limits set queue default --max-running 5 --burst 2", ErrorKind::MissingRequiredArgument),
    ] {
        assert_eq!(parse(line).err(), Some(kind), "{line}");
    }
}

/// Wherever one is asked for.
#[test]
fn what_is_no_id_is_told_what_one_would_be() {
    for command in ["get", "wait", "watch", "cancel", "retry", "edit --delay 1s"] {
        let line = format!("tasklane {command} nonsense");
        let error = Cli::try_parse_from(line.split(' ')).unwrap_err().to_string();
        assert!(error.contains("must be a task's id (UUID)"), "{line}: {error}");
    }
    for command in ["get", "wait", "cancel", "retry"] {
        assert!(parse(&format!("tasklane {command} -")).is_ok(), "{command}");
    }
}
