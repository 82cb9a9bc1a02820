# Puts entries of the folder $root in place, and what stood there back, by renaming. POSIX sh, GNU or busybox tools.
#
#   sh trees.sh STEP ROOT STAGING BASE ENTRY...      without an ENTRY: all that is in ROOT
#
# All is kept below STAGING, a folder in ROOT: ROOT may be a mount point, and only within it are renames possible.
#
#   new/BASE/  what was unpacked      old/    what stood before    moving/  on its way to old/
#   drop/      what a revert removes  twice/  what somebody put in ROOT under a name that was moved already
#   before, after                     mode, owner and time of ROOT as it was, and as it will be; .tar: its ACL and attributes
#   made, parents/                    how many levels of ROOT, and which folders in it, did not exist
#   staged, away, placed, cleared     the steps that are done: each may be killed anywhere and run again
set -eu
step=$1 root=$2 staging=$3 base=$4
shift 4
new=$staging/new${base:+/$base} gone=$staging.gone

parent_of() { # unlike dirname, for names with a leading dash and newlines as well
  case $1 in */*) parent=${1%/*} ;; *) parent=. ;; esac
}
there() { [ -e "$1" ] || [ -L "$1" ]; }
done_with() { [ -e "$staging/$1" ]; }
fail() {
  printf '%s\n' "$1" >&2
  exit 1
}
note() { # NAME TEXT: a file with TEXT, whole or not at all
  printf '%s\n' "$2" >"$staging/note"
  mv -f "$staging/note" "$staging/$1"
}
attributes() { stat -c '00%a %u:%g @%Y' "$1"; }
apply_attributes() { # FOLDER "MODE OWNER TIME"
  [ "$(attributes "$1")" != "$2" ] || return 0
  set -- "$1" $2
  [ "$(stat -c '%u:%g' "$1")" = "$3" ] || chown "$3" "$1"
  chmod "$2" "$1"
  touch -d "$4" "$1"
}
kept='--xattrs --xattrs-include=user.* --xattrs-include=security.capability --acls'
note_attributes() { # FOLDER NAME: the folder's own ACL and extended attributes, where there is a GNU tar
  case $(tar --version 2>/dev/null) in *'GNU tar'*) ;; *) return 0 ;; esac
  tar --create --format=posix --numeric-owner $kept --directory "$1" --no-recursion --file "$staging/note" .
  mv -f "$staging/note" "$staging/$2.tar"
}
give_attributes() { # FOLDER NAME: and mode, owner and time; what cannot be kept there the comparison has told
  if [ -e "$staging/$2.tar" ]; then
    tar --extract --numeric-owner --preserve-permissions $kept --directory "$1" --file "$staging/$2.tar" 2>/dev/null || true
  fi
  apply_attributes "$1" "$(cat "$staging/$2")"
}
remove() { # folders whose owner may not write in them do not let go of their entries
  if ! rm -rf "$1" 2>/dev/null; then
    find "$1" -type d -exec chmod u+rwx {} \;
    rm -rf "$1"
  fi
}

move_all() { # FROM TO: by many at once; again until nothing is left, as FROM changes while it is read
  while [ -n "$(find "$1" -mindepth 1 -maxdepth 1 ! -name '.ai-micro-backup-*' | head -c 1)" ]; do
    find "$1" -mindepth 1 -maxdepth 1 ! -name '.ai-micro-backup-*' \
      -exec sh -c 'to=$1; shift; mv -f -- "$@" "$to/"' sh "$2" {} +
  done
}
move_one() { # FROM TO ENTRY
  parent_of "$2/$3"
  mkdir -p "$parent"
  mv -f -- "$1/$3" "$2/$3"
}
for_each_in() { # FOLDER COMMAND: COMMAND gets each name in FOLDER
  for path in "$1"/* "$1"/.[!.]* "$1"/..?*; do
    if there "$path"; then "$2" "${path##*/}"; fi
  done
}

# Somebody wrote under a name that is accounted for: what stood before the restore counts.
make_room() {
  if there "$root/$1"; then
    remove "$staging/twice/$1"
    move_one "$root" "$staging/twice" "$1"
  fi
}
# A rename is there or not. In both places it is when a copy was cut short (a folder of an image's own layer, another
# file system behind a link), or when somebody wrote again just then: nobody can tell, so nothing is removed.
refuse_both() {
  if there "$root/$1"; then
    fail "$root/$1 is in $staging/moving as well: move away the one that is not whole, and try again"
  fi
}
drop_staging() { # NOTE: with the attributes that ROOT is to have, or none
  if [ -d "$staging" ]; then
    # Mode and owner while they are known for sure; the time changes once more.
    if [ -e "$staging/$1" ]; then give_attributes "$root" "$1"; fi
    remove "$gone"
    mv "$staging" "$gone"
  fi
  [ -d "$gone" ] || return 0
  wanted=$(cat "$gone/$1" 2>/dev/null) || wanted=
  made=$(cat "$gone/made" 2>/dev/null) || made=0
  remove "$gone"
  if [ -n "$wanted" ]; then apply_attributes "$root" "$wanted"; fi
}

mounted_in() { # PATH: the first mount point at or below it
  [ -r /proc/self/mountinfo ] || return 0
  while read -r _ _ _ _ point _; do
    case $point in *\\*) point=$(printf '%b.' "$(printf %s "$point" | sed 's/\\/\\0/g')") && point=${point%.} ;; esac
    case $point in "$1" | "$1"/*) printf %s "$point" && return ;; esac
  done </proc/self/mountinfo
}
refuse_mounts() { # what is mounted can neither be renamed nor kept
  if [ $# = 0 ]; then set -- .; fi
  for entry; do
    if [ "$entry" = . ]; then
      for_each_in "$root" refuse_mount
    else
      refuse_mount "$entry"
    fi
  done
}
refuse_mount() {
  point=$(mounted_in "$root/$1")
  [ -z "$point" ] || fail "$point is mounted inside what would be replaced: restore what is beside it by its path, or into another folder"
}

prepare() {
  if [ -d "$staging" ]; then
    if done_with staged; then
      printf staged
      return
    fi
    remove "$staging/new"
  else
    made=0 level=$root
    while [ ! -d "$level" ]; do
      ! there "$level" || fail "$level is no folder"
      made=$((made + 1)) level=$(dirname "$level")
    done
    [ -z "${FRESH:-}" ] || [ ! -d "$root" ] || [ -z "$(ls -A "$root")" ] || fail "$root is not empty"
    refuse_mounts "$@"
    mkdir -p "$root"
    before=$(attributes "$root")
    mkdir -m 700 "$staging"
    chmod g-s "$staging" # what is made in it would have it from a root that has it
    note made "$made"
    if [ $# = 0 ]; then note_attributes "$root" before; fi
    note before "$before"
  fi
  mkdir -p "$staging/new" "$staging/old" "$staging/moving" "$staging/drop" "$staging/twice" "$staging/parents"
}

finish_stage() {
  if [ $# = 0 ]; then
    [ -d "$new" ] || fail "the backup does not hold the folder $base"
    note_attributes "$new" after
    note after "$(attributes "$new")"
  fi
  note staged ''
}

# In what follows "$@" are the listed entries: with none, all entries of a folder are meant.
to_old() {
  if [ $# = 0 ]; then
    for_each_in "$staging/moving" refuse_both
    move_all "$staging/moving" "$staging/old"
    for_each_in "$staging/old" make_room
    move_all "$root" "$staging/moving"
    move_all "$staging/moving" "$staging/old"
    return
  fi
  for entry; do
    if there "$staging/moving/$entry"; then
      refuse_both "$entry"
      move_one "$staging/moving" "$staging/old" "$entry"
    fi
    if there "$staging/old/$entry"; then
      make_room "$entry"
    elif there "$root/$entry"; then
      move_one "$root" "$staging/moving" "$entry"
      move_one "$staging/moving" "$staging/old" "$entry"
    fi
  done
}
make_parents() { # ENTRY: and remember which did not exist
  parent_of "$1"
  while [ "$parent" != . ] && [ ! -d "$root/$parent" ]; do
    mkdir -p "$staging/parents/$parent"
    : >"$staging/parents/$parent/.made"
    parent_of "$parent"
  done
  parent_of "$root/$1"
  mkdir -p "$parent"
}
finish_parents() { # ENTRY: owner and mode as the backup holds them
  parent_of "$1"
  while [ "$parent" != . ]; do
    if [ -e "$staging/parents/$parent/.made" ] && [ -d "$new/$parent" ]; then
      apply_attributes "$root/$parent" "$(attributes "$new/$parent")"
    fi
    parent_of "$parent"
  done
}
remove_parents() {
  parent_of "$1"
  while [ "$parent" != . ]; do
    if [ -e "$staging/parents/$parent/.made" ]; then rmdir "$root/$parent" 2>/dev/null || true; fi
    parent_of "$parent"
  done
}
from_new() {
  if [ $# = 0 ]; then
    for_each_in "$new" make_room
    move_all "$new" "$root"
    give_attributes "$root" after
    return
  fi
  for entry; do
    if there "$new/$entry"; then
      make_room "$entry"
      make_parents "$entry"
      mv -f -- "$new/$entry" "$root/$entry"
    fi
    finish_parents "$entry"
  done
}
clear() {
  if [ $# = 0 ]; then
    for_each_in "$staging/drop" make_room
    move_all "$root" "$staging/drop"
    return
  fi
  for entry; do
    if there "$staging/drop/$entry"; then
      make_room "$entry"
    elif there "$root/$entry"; then
      move_one "$root" "$staging/drop" "$entry"
    fi
  done
}
from_old() {
  if [ $# = 0 ]; then
    for_each_in "$staging/moving" refuse_both
    move_all "$staging/moving" "$staging/old"
    for_each_in "$staging/old" make_room
    move_all "$staging/old" "$root"
    return
  fi
  for entry; do
    if there "$staging/moving/$entry"; then refuse_both "$entry"; fi
    for folder in moving old; do
      if there "$staging/$folder/$entry"; then
        make_room "$entry"
        parent_of "$root/$entry"
        mkdir -p "$parent"
        mv -f -- "$staging/$folder/$entry" "$root/$entry"
      fi
    done
    remove_parents "$entry"
  done
}

bring_back() {
  [ -d "$staging" ] || return 0
  if done_with away && ! done_with cleared; then
    clear "$@"
    note cleared ''
  fi
  from_old "$@"
}

case $step in
prepare) prepare "$@" ;;
staged) finish_stage "$@" ;;
swap)
  done_with staged || fail "nothing is staged in $staging"
  ! done_with cleared || fail "this restore is being reverted"
  # Not "||": in what stands beside it, "set -e" is off.
  if ! done_with away; then
    to_old "$@"
    note away ''
  fi
  if ! done_with placed; then
    from_new "$@"
    note placed ''
  fi
  ;;
back)
  bring_back "$@"
  if [ -e "$staging/before" ]; then apply_attributes "$root" "$(cat "$staging/before")"; fi
  ;;
revert)
  bring_back "$@"
  drop_staging before
  made=${made:-0} level=$root
  while [ "$made" -gt 0 ] && rmdir "$level" 2>/dev/null; do
    made=$((made - 1)) level=$(dirname "$level")
  done
  ;;
settle)
  if [ -d "$staging" ]; then
    done_with placed || fail "$staging is not in place yet"
    sync
  fi
  drop_staging after
  ;;
esac
