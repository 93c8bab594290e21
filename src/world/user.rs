//! Users of this machine.

use std::io;

/// A user and a group, as numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// The user's primary group, or the one that was named instead.
    pub gid: u32,
}

impl User {
    /// The user of this name or number in passwd(5).
    ///
    /// # Errors
    /// If there is no such user, or the file cannot be read.
    pub fn named(name: &str) -> io::Result<Self> {
        if name == "root" {
            return Ok(Self { uid: 0, gid: 0 });
        }
        let entry = entry("/etc/passwd", name)?.ok_or_else(|| unknown("user", name))?;
        let number = |field: usize| entry.get(field)?.parse().ok();
        number(2).zip(number(3)).map(|(uid, gid)| Self { uid, gid }).ok_or_else(|| unknown("user", name))
    }

    /// The user of this name with the group of that name as its only one; a number need not be in passwd(5) or group(5).
    ///
    /// # Errors
    /// As [`named`](Self::named), and if there is no such group.
    pub fn with_group(name: &str, group: &str) -> io::Result<Self> {
        let number = |path: &str, name: &str| match name.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Ok::<Option<u32>, io::Error>(entry(path, name)?.and_then(|entry| entry.get(2)?.parse().ok())),
        };
        let uid = number("/etc/passwd", name)?.ok_or_else(|| unknown("user", name))?;
        let gid = number("/etc/group", group)?.ok_or_else(|| unknown("group", group))?;
        Ok(Self { uid, gid })
    }
}

/// The fields of the line for this name, or for this number, in a file such as passwd(5).
fn entry(path: &str, name: &str) -> io::Result<Option<Vec<String>>> {
    let content = std::fs::read_to_string(path)?;
    let lines = || content.lines().map(|line| line.split(':').map(str::to_owned).collect::<Vec<_>>());
    let field = |place: usize| lines().find(|fields| fields.get(place).is_some_and(|field| field == name));
    Ok(field(0).or_else(|| field(2)))
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
        // Whose group is not known: it may be anybody's.
        assert!(User::named("4000000000").is_err());
    }
}
