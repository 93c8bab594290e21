//! Temporary PKCS#11 tokens: SoftHSM 2, and kryoptic, an independent implementation of PKCS#11 3.2.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::condition::holds_within;

/// The slot assigned to the token in kryoptic's configuration; SoftHSM assigns one itself.
const KRYOPTIC_SLOT: &str = "42";
const SECURITY_OFFICER_PIN: &str = "27182818";

/// The module that provides a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenModule {
    /// SoftHSM 2 (Debian package softhsm2): PKCS#11 2.40.
    SoftHsm,
    /// Kryoptic, as `tests/kryoptic/build` builds it.
    Kryoptic,
}

impl TokenModule {
    /// The path of the shared object.
    #[must_use]
    pub fn path(self) -> PathBuf {
        match self {
            Self::SoftHsm => {
                let directories = ["/usr/lib/softhsm", "/usr/lib/x86_64-linux-gnu/softhsm", "/usr/lib64/softhsm"];
                let paths = directories.iter().map(|directory| Path::new(directory).join("libsofthsm2.so"));
                paths.into_iter().find(|path| path.exists()).expect("SoftHSM 2, Debian package softhsm2, is installed")
            }
            Self::Kryoptic => std::env::var_os("PINTLE_TEST_KRYOPTIC")
                .map(PathBuf::from)
                .expect("PINTLE_TEST_KRYOPTIC names the module; ./tests/run sets it"),
        }
    }
}

/// A private key as listed by pkcs11-tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenKey {
    /// CKA_LABEL.
    pub label: String,
    /// CKA_ID, hexadecimal.
    pub id: String,
    /// Its access attributes: `sensitive`, `always sensitive`, `never extractable`, `local`.
    pub access: Vec<String>,
    /// Its permitted uses, such as `sign`.
    pub usage: Vec<String>,
}

/// An initialised token whose files are in one directory.
#[derive(Debug)]
pub struct Token {
    module: TokenModule,
    directory: PathBuf,
    /// A module between the agent and the real one.
    between: Option<PathBuf>,
}

impl Token {
    /// The token's label.
    pub const LABEL: &str = "node keys";
    /// The user's PIN.
    pub const PIN: &str = "31415926";

    /// Creates a token in `directory`, which is created.
    #[must_use]
    pub fn new(module: TokenModule, directory: PathBuf) -> Self {
        let token = Self { module, directory, between: None };
        fs::create_dir_all(token.tokens()).expect("a directory for the token");
        let softhsm = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
            token.tokens().display()
        );
        fs::write(token.directory.join("softhsm2.conf"), softhsm).expect("softhsm2.conf is written");
        let kryoptic = format!(
            "[[slots]]\nslot = {KRYOPTIC_SLOT}\ndbtype = \"sqlite\"\ndbargs = \"{}\"\n",
            token.tokens().join("token.sql").display()
        );
        fs::write(token.directory.join("kryoptic.conf"), kryoptic).expect("kryoptic.conf is written");
        let slot = ["--slot", KRYOPTIC_SLOT, "--so-pin", SECURITY_OFFICER_PIN];
        match module {
            TokenModule::SoftHsm => {
                let mut command = Command::new("softhsm2-util");
                command.args(["--init-token", "--free", "--label", Self::LABEL, "--pin", Self::PIN]);
                token.run(command.args(["--so-pin", SECURITY_OFFICER_PIN])).expect("the token is initialised");
            }
            TokenModule::Kryoptic => {
                let initialise = [&slot[..], &["--init-token", "--label", Self::LABEL]].concat();
                token.pkcs11_tool(&initialise).expect("the token is initialised");
                let login = ["--login", "--login-type", "so", "--init-pin", "--pin", Self::PIN];
                token.pkcs11_tool(&[&slot[..], &login].concat()).expect("the user's PIN is set");
            }
        }
        token.write_pin(Self::PIN);
        token
    }

    /// The same token behind the module `between`, which finds the real one through `PINTLE_TEST_REAL_MODULE` or, if
    /// it is OpenSC's pkcs11-spy, `PKCS11SPY`.
    #[must_use]
    pub fn behind(self, between: PathBuf) -> Self {
        Self { between: Some(between), ..self }
    }

    /// The environment variables for the modules.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        vec![
            ("SOFTHSM2_CONF", self.directory.join("softhsm2.conf")),
            ("KRYOPTIC_CONF", self.directory.join("kryoptic.conf")),
            ("PINTLE_TEST_REAL_MODULE", self.module.path()),
            ("PINTLE_TEST_FAULT", self.fault_file()),
            ("PKCS11SPY", self.module.path()),
            ("PKCS11SPY_OUTPUT", self.directory.join("spy.log")),
        ]
    }

    /// The fields of a backend's table in pintle's configuration.
    #[must_use]
    pub fn table(&self) -> String {
        let module = self.between.clone().unwrap_or_else(|| self.module.path());
        format!(
            "type = \"pkcs11\"\nuri = \"pkcs11:token={}\"\nmodule = \"{}\"\npin-file = \"{}\"\n",
            Self::LABEL.replace(' ', "%20"),
            module.display(),
            self.pin_file().display()
        )
    }

    /// The directory where the module stores its tokens.
    fn tokens(&self) -> PathBuf {
        self.directory.join("tokens")
    }

    /// The file that the agent reads the PIN from.
    #[must_use]
    pub fn pin_file(&self) -> PathBuf {
        self.directory.join("pin")
    }

    fn fault_file(&self) -> PathBuf {
        self.directory.join("fault")
    }

    /// Moves the token's storage away.
    pub fn remove(&self) {
        fs::rename(self.tokens(), self.directory.join("elsewhere")).expect("the token is moved away");
    }

    /// Moves the token's storage back.
    pub fn put_back(&self) {
        fs::rename(self.directory.join("elsewhere"), self.tokens()).expect("the token is moved back");
    }

    /// Writes the file that the agent reads the PIN from.
    pub fn write_pin(&self, pin: &str) {
        let new = self.directory.join("pin.new");
        let _ = fs::remove_file(&new);
        fs::write(&new, format!("{pin}\n")).expect("the PIN's file is written");
        fs::set_permissions(&new, fs::Permissions::from_mode(0o400)).expect("its mode is set");
        fs::rename(new, self.pin_file()).expect("the PIN's file is replaced");
    }

    /// Makes the faulty module inject this fault until [`Token::mend`].
    pub fn fault(&self, fault: &str) {
        fs::write(self.fault_file(), fault).expect("the fault is written");
    }

    /// Removes the fault.
    pub fn mend(&self) {
        fs::remove_file(self.fault_file()).expect("there was a fault");
    }

    /// How often C_Login was called, according to pkcs11-spy.
    #[must_use]
    pub fn logins(&self) -> usize {
        let log = fs::read(self.directory.join("spy.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).lines().filter(|line| line.ends_with(": C_Login")).count()
    }

    /// Runs pkcs11-tool on the token.
    ///
    /// # Errors
    /// Its output, if it fails.
    pub fn pkcs11_tool(&self, arguments: &[&str]) -> Result<Vec<u8>, String> {
        self.run(Command::new("pkcs11-tool").arg("--module").arg(self.module.path()).args(arguments))
    }

    /// Runs pkcs11-tool on the token, logged in with this PIN.
    ///
    /// # Errors
    /// As [`pkcs11_tool`](Self::pkcs11_tool).
    pub fn pkcs11_tool_with_pin(&self, pin: &str, arguments: &[&str]) -> Result<Vec<u8>, String> {
        self.pkcs11_tool(&[&["--token-label", Self::LABEL, "--login", "--pin", pin], arguments].concat())
    }

    /// As [`pkcs11_tool_with_pin`](Self::pkcs11_tool_with_pin) with the token's initial PIN. Retries several times:
    /// kryoptic fails while another process writes.
    #[track_caller]
    #[must_use]
    pub fn tool(&self, arguments: &[&str]) -> Vec<u8> {
        let mut last = String::new();
        let found = holds_within(Duration::from_secs(10), || {
            self.pkcs11_tool_with_pin(Self::PIN, arguments).map_err(|error| last = error).ok()
        });
        found.unwrap_or_else(|| panic!("{last}"))
    }

    /// The private keys in the token that pintle created, as listed by pkcs11-tool.
    #[track_caller]
    #[must_use]
    pub fn keys(&self) -> Vec<TokenKey> {
        keys_listed(&String::from_utf8_lossy(&self.tool(&["--list-objects", "--type", "privkey"])))
    }

    fn run(&self, command: &mut Command) -> Result<Vec<u8>, String> {
        let output = command.envs(self.environment()).output().map_err(|error| format!("{command:?}: {error}"))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let words = [output.stdout, output.stderr].concat();
        Err(format!("{command:?}: {}", String::from_utf8_lossy(&words)))
    }
}

/// SoftHSM may also contain objects without a name, left by a process that was killed before it had written the
/// template's attributes. They are not keys.
fn keys_listed(text: &str) -> Vec<TokenKey> {
    let words = |text: &str| text.split(',').map(|word| word.trim().to_owned()).collect::<Vec<_>>();
    let mut keys: Vec<TokenKey> = Vec::new();
    for line in text.lines() {
        if line.starts_with("Private Key Object") {
            keys.push(TokenKey { label: String::new(), id: String::new(), access: Vec::new(), usage: Vec::new() });
        }
        let (Some(key), Some((name, value))) = (keys.last_mut(), line.split_once(':')) else { continue };
        match name.trim() {
            "label" => value.trim().clone_into(&mut key.label),
            "ID" => value.trim().clone_into(&mut key.id),
            "Access" => key.access = words(value),
            "Usage" => key.usage = words(value),
            _ => {}
        }
    }
    keys.retain(|key| key.label.starts_with("pintle "));
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_listed_without_nameless_objects() {
        let text = "Private Key Object; EC\n  label:      pintle node_client_1\n  ID:         6e6f\n  Usage:      sign\n  \
                    Access:     sensitive, always sensitive, never extractable, local\nPrivate Key Object; EC\n  \
                    Usage:      none\n";
        let keys = keys_listed(text);
        assert_eq!(keys.len(), 1);
        assert_eq!((keys[0].label.as_str(), keys[0].id.as_str()), ("pintle node_client_1", "6e6f"));
        assert_eq!(keys[0].access.len(), 4);
    }
}
