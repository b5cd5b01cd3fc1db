-- Takes a due callback for one attempt and hides it from others for as long as an attempt may last.
-- KEYS  1 session hash, 2 content hash, 3 deadlines zset
-- ARGV  1 id, 2 visibility in ms (more than an attempt may last)
-- gives nil | {attempt, '1' if an earlier attempt may have arrived, session as a flat list, content as a flat list}
-- Atomic: two workers must not take one callback at the same time. An attempt that is found open belongs to a worker that
-- was lost in the middle of it: nobody knows whether it arrived.
local s = redis.call('HMGET', KEYS[1], 'callback', 'open')
if s[1] ~= 'owed' then
  if s[1] or redis.call('EXISTS', KEYS[1]) == 0 then
    redis.call('ZREM', KEYS[3], ARGV[1])
  end
  return nil
end
local now = now_ms()
local deadline = redis.call('ZSCORE', KEYS[3], ARGV[1])
if deadline and tonumber(deadline) > now then
  return nil
end
if s[2] == '1' then
  redis.call('HSET', KEYS[1], 'ambiguous', '1')
end
redis.call('HSET', KEYS[1], 'open', '1')
local attempt = redis.call('HINCRBY', KEYS[1], 'attempt', 1)
redis.call('ZADD', KEYS[3], now + ARGV[2], ARGV[1])
return { attempt, redis.call('HGET', KEYS[1], 'ambiguous') or '0',
  redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2]) }
