-- What people say of themselves.
CREATE TYPE visibility AS ENUM ('private', 'friends', 'public');

CREATE TABLE profiles (
    id          bigserial PRIMARY KEY,
    username    text NOT NULL UNIQUE,
    name        text NOT NULL,
    biography   text,
    preferences jsonb NOT NULL DEFAULT '{}',
    avatar      bytea,
    shown_to    visibility NOT NULL DEFAULT 'private',
    changed_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX profiles_preferences ON profiles USING gin (preferences);

CREATE TABLE addresses (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    profile_id bigint NOT NULL REFERENCES profiles (id) ON DELETE CASCADE,
    lines      text[] NOT NULL,
    postcode   char(8)
);

-- A table whose name needs quoting in every tool, and one that nobody has used yet.
CREATE TABLE "メモ ""notes""" (
    "番号" integer PRIMARY KEY,
    "本文" text NOT NULL
);
CREATE TABLE notifications (
    id   bigserial PRIMARY KEY,
    body text NOT NULL
);

CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.changed_at := now();
    RETURN NEW;
END $$;
CREATE TRIGGER profiles_touch BEFORE UPDATE ON profiles FOR EACH ROW EXECUTE FUNCTION touch();

-- Handed out to other systems, so a restore must not hand a number out twice.
CREATE SEQUENCE member_number START 100000 INCREMENT 7;
