//! Users of this machine.

use std::io;

use nix::errno::Errno;
use nix::unistd::{self, Uid};

/// A user ID and a group ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// The primary group, or the group that was named instead.
    pub gid: u32,
}

impl User {
    /// Looks up a user by name or number in the name service (nsswitch.conf(5)), which may include LDAP, SSSD or
    /// systemd. Blocks until it answers.
    ///
    /// # Errors
    /// If there is no such user, or the name service does not answer.
    pub fn named(name: &str) -> io::Result<Self> {
        if name == "root" {
            return Ok(Self { uid: 0, gid: 0 });
        }
        let by_number = || name.parse().map_or(Ok(None), |uid| unistd::User::from_uid(Uid::from_raw(uid)));
        let found = found(unistd::User::from_name(name), by_number)?.ok_or_else(|| unknown("user", name))?;
        Ok(Self { uid: found.uid.as_raw(), gid: found.gid.as_raw() })
    }

    /// A user and a group, each by name or number. A number need not be known to the name service.
    ///
    /// # Errors
    /// As [`named`](Self::named), and if there is no such group.
    pub fn with_group(name: &str, group: &str) -> io::Result<Self> {
        let uid = match name.parse() {
            Ok(uid) => uid,
            Err(_) => Self::named(name)?.uid,
        };
        let gid = match group.parse() {
            Ok(gid) => gid,
            Err(_) => {
                let found = found(unistd::Group::from_name(group), || Ok(None))?;
                found.ok_or_else(|| unknown("group", group))?.gid.as_raw()
            }
        };
        Ok(Self { uid, gid })
    }
}

/// The result of a lookup by name, or else by number. For an unknown name, some name services return one of these
/// errors instead of no result (getpwnam(3)).
fn found<T>(
    by_name: nix::Result<Option<T>>,
    by_number: impl FnOnce() -> nix::Result<Option<T>>,
) -> io::Result<Option<T>> {
    let absent = |result| match result {
        Err(Errno::ENOENT | Errno::ESRCH | Errno::EBADF | Errno::EPERM) => Ok(None),
        result => result,
    };
    match absent(by_name)? {
        Some(found) => Ok(Some(found)),
        None => Ok(absent(by_number())?),
    }
}

fn unknown(what: &str, name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("there is no {what} {name:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_names_or_numbers() {
        let user = |uid, gid| User { uid, gid };
        assert_eq!(User::named("root").expect("there"), user(0, 0));
        assert_eq!(User::named("nobody").expect("there"), User::named("65534").expect("there"));
        assert_eq!(User::with_group("12", "root").expect("numbers"), user(12, 0));
        assert_eq!(User::with_group("root", "4000000000").expect("numbers"), user(0, 4_000_000_000));
        assert!(User::named("no-such-user").is_err() && User::with_group("root", "no such group").is_err());
        // The number has no known primary group.
        assert!(User::named("4000000000").is_err());
    }
}
