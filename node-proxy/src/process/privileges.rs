//! What this process is allowed to do, as `/proc/self/status` says, and the refusal to run with more than
//! it needs.

use std::fmt;

/// The rows of `/proc/self/status` that matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Privileges {
    uid: u32,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
    no_new_privs: bool,
    seccomp: u32,
}

/// Why the process must not go on.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// /proc is not mounted, or not as expected.
    #[error("/proc/self/status: {0}; mount /proc")]
    Unreadable(String),
    /// Root.
    #[error(
        "runs as uid 0; run it as another user (the chart uses 65532), or pass --allow-privileged \
         for an experiment"
    )]
    Root,
    /// A capability set is not empty.
    #[error(
        "has capabilities (effective {effective:#x}, permitted {permitted:#x}, inheritable \
         {inheritable:#x}, ambient {ambient:#x}) and needs none; drop all of them, or pass \
         --allow-privileged for an experiment"
    )]
    Capabilities {
        /// CapEff
        effective: u64,
        /// CapPrm
        permitted: u64,
        /// CapInh
        inheritable: u64,
        /// CapAmb
        ambient: u64,
    },
}

impl Privileges {
    /// Those of the calling thread.
    pub fn read() -> Result<Self, PrivilegeError> {
        let status = std::fs::read_to_string("/proc/self/status")
            .map_err(|e| PrivilegeError::Unreadable(e.to_string()))?;
        Self::parse(&status)
    }

    fn parse(status: &str) -> Result<Self, PrivilegeError> {
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .and_then(|rest| rest.split_whitespace().nth(usize::from(name == "Uid")))
                .ok_or_else(|| PrivilegeError::Unreadable(format!("no field {name}")))
        };
        let number = |name: &str, radix: u32| {
            u64::from_str_radix(field(name)?, radix)
                .map_err(|e| PrivilegeError::Unreadable(format!("field {name}: {e}")))
        };
        let small = |name: &str| {
            u32::try_from(number(name, 10)?)
                .map_err(|e| PrivilegeError::Unreadable(format!("field {name}: {e}")))
        };
        Ok(Self {
            uid: small("Uid")?,
            effective: number("CapEff", 16)?,
            permitted: number("CapPrm", 16)?,
            inheritable: number("CapInh", 16)?,
            ambient: number("CapAmb", 16)?,
            no_new_privs: small("NoNewPrivs")? == 1,
            seccomp: small("Seccomp")?,
        })
    }

    /// Refuses root and any capability.
    pub fn check(&self) -> Result<(), PrivilegeError> {
        if self.uid == 0 {
            return Err(PrivilegeError::Root);
        }
        if self.effective | self.permitted | self.inheritable | self.ambient != 0 {
            return Err(PrivilegeError::Capabilities {
                effective: self.effective,
                permitted: self.permitted,
                inheritable: self.inheritable,
                ambient: self.ambient,
            });
        }
        Ok(())
    }
}

impl fmt::Display for Privileges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            uid,
            effective,
            permitted,
            inheritable: _,
            ambient: _,
            no_new_privs,
            seccomp,
        } = self;
        write!(
            f,
            "uid={uid} capabilities={effective:#x} permitted={permitted:#x} no_new_privs={} seccomp={seccomp}",
            u8::from(*no_new_privs)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tx\nUid:\t1000\t65532\t65532\t65532\nCapInh:\t0000000000000000\n\
        CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\n\
        CapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n";

    #[test]
    fn an_unprivileged_process_may_run() {
        let privileges = Privileges::parse(STATUS).unwrap();
        assert_eq!(
            privileges.to_string(),
            "uid=65532 capabilities=0x0 permitted=0x0 no_new_privs=1 seccomp=2"
        );
        privileges.check().unwrap();
    }

    #[test]
    fn root_and_every_capability_set_is_refused() {
        let root = STATUS.replace("\t1000\t65532", "\t0\t0");
        assert!(Privileges::parse(&root).unwrap().check().is_err());
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            let status = STATUS.replace(
                &format!("{set}:\t0000000000000000"),
                &format!("{set}:\t0000000000001000"),
            );
            let error = Privileges::parse(&status).unwrap().check().unwrap_err();
            assert!(error.to_string().contains("0x1000"), "{error}");
        }
    }

    #[test]
    fn a_missing_field_is_named() {
        let error = Privileges::parse("Uid:\t1\t1\t1\t1\n").unwrap_err();
        assert!(error.to_string().contains("CapEff"), "{error}");
        Privileges::read().unwrap();
    }
}
