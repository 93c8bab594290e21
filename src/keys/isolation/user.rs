//! As whom a child runs.

use std::fs::read_to_string;

use pintle_plugins_api::{BackendError, BackendErrorKind};

/// A user and a group, as numbers. A child that changes its user keeps no other group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Credentials {
    pub(super) user: u32,
    pub(super) group: u32,
}

impl Credentials {
    /// Those of this user; of this group instead of the user's own, if one is named. Both may be numbers.
    pub(super) fn of(user: &str, group: Option<&str>) -> Result<Self, BackendError> {
        let entry = entry("/etc/passwd", user);
        let number = user.parse().ok().or_else(|| entry.as_ref()?.get(2)?.parse().ok());
        let number = number.ok_or_else(|| unknown("user", user))?;
        let group = match group {
            Some(name) => {
                let found = || self::entry("/etc/group", name)?.get(2)?.parse().ok();
                name.parse().ok().or_else(found).ok_or_else(|| unknown("group", name))?
            }
            None => match entry.and_then(|entry| entry.get(3)?.parse().ok()) {
                Some(group) => group,
                None => return Err(unknown("group of user", user)),
            },
        };
        Ok(Self { user: number, group })
    }
}

/// The fields of the line for `name` in a file such as passwd(5).
fn entry(path: &str, name: &str) -> Option<Vec<String>> {
    let content = read_to_string(path).ok()?;
    let line = content.lines().find(|line| line.split(':').next() == Some(name))?;
    Some(line.split(':').map(str::to_owned).collect())
}

fn unknown(what: &str, name: &str) -> BackendError {
    BackendError::new(BackendErrorKind::Unsupported, format!("there is no {what} {name:?} to run the backend as"))
        .with_hint("name a user and a group of /etc/passwd and /etc/group, or their numbers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_understood_and_others_refused() {
        assert_eq!(Credentials::of("root", None), Ok(Credentials { user: 0, group: 0 }));
        assert_eq!(Credentials::of("12", Some("root")), Ok(Credentials { user: 12, group: 0 }));
        assert!(Credentials::of("no such user", None).is_err());
        assert!(Credentials::of("root", Some("no such group")).is_err());
    }
}
